"""Adaptation methods: inserts at named sites, side networks, and rules for what trains."""
