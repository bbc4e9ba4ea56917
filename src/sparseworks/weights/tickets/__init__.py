"""Lottery tickets, soups and searches over masks: methods that train several times."""
