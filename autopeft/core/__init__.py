"""Plain data and mathematics: no torch models here."""
