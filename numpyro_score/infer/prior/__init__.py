"""A posterior as a prior: the joint law of sites, learned from draws and checked."""
