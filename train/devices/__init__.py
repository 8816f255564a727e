"""Devices and processes: the mesh, the sharding table, collectives between hosts, chips and compiler options."""
