"""What every operator means, in plain PyTorch: any device, any dtype, exact in float64."""
