"""The ways to do a work, one file each: a class that is made of a `Setting` and trains until it is stopped."""
