"""Parameter name to block, role and (out, in) matrix; which matrices of two models belong together."""
