"""What the tests share: matrices with known answers, tolerances, and exact references."""
