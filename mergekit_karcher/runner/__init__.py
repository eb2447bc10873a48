"""A whole merge in units that can be lost, gone on with, and spread over machines."""
