"""The benchmark client: talks HTTP only, and works as this folder alone, without the server's packages."""
