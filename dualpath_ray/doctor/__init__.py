"""What `dualpath doctor` looks at on one machine. Every line says what was found and, if it is wrong, what to do."""
