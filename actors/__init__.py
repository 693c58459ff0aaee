"""The Ray shell around dualpath_ray: actors, their calls, placement and supervision. One module per actor."""
