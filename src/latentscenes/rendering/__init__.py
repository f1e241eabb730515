"""Tri-planes and rays to features, depth and opacity: plain torch and fast kernels. Imports only core."""
