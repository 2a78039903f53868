"""`nnunet-ssl report`: a training, its predictions and what to do next, on one page that opens anywhere."""
