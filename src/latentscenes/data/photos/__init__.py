"""Import of photographs with COLMAP reconstructions and masks. Imports only core and files of data."""
