"""Methods that turn weights into integers, alone or together with zeros."""
