"""Readers: pictures and clips as everything here sees them, whoever shows them: data sets, drawing, pages."""
