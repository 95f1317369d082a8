"""Everything that changes Lightning or reads its private parts."""
