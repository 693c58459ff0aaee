"""Several hosts on one machine: network namespaces with separate storage, compute and control networks (docs/experiments.md)."""
