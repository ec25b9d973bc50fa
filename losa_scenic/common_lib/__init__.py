"""Helpers that every other part uses: errors, parameter trees, configuration."""
