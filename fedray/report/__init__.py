"""What people read: the terminal, tables and pages."""
