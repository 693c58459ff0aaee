"""Discrete-event simulator of a DualPath cluster: the scheduler is the very code of `policies/`, hardware and engines are modelled."""
