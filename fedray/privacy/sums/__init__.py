"""The parts of a secure sum: fixed point, shares, who may be neighbours, rules, identities, what a client remembers."""
