"""What people look at: pictures, tables and cards. Reads the store; computes no model output."""
