"""Looks at models and changes nothing: angles, gradients, similarity, importance, clusterability."""
