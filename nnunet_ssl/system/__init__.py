"""Files, processes and clusters; nothing here knows of segmentation."""
