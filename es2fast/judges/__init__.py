"""Who says how an answer ended: rules, and whatever else keeps the contract of `base`."""
