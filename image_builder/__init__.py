"""Bakes the images and seeds that service engines start from."""
