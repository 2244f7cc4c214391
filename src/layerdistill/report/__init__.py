"""What people read: tables and figures made from finished runs; needs no torch."""
