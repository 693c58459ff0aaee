"""What watches a running system from outside: Prometheus rules, a Grafana dashboard."""
