"""The tiny cascade: shipped Stage I and Stage II weights of IF's classes that train and sample on a CPU in a minute."""
