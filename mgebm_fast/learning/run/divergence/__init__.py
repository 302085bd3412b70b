"""Runs that diverge: what is watched, which states are good, and going back to one."""
