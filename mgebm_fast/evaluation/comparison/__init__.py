"""Methods side by side: their runs, what is measured of them, the table and the pictures."""
