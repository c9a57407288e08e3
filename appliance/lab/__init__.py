"""A controller and SEs as local processes without root, and a simulated fleet for scale."""
