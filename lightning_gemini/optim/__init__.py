"""Update rules and master weights as pure tensor functions: the lowest room."""
