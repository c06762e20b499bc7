"""How much may run: slots, rates, overload."""
