"""Storms: many containers started at once, measured."""
