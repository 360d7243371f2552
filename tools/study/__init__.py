"""The paper's claims in small: reproduce runs the study; data, subsets, peers and table are its parts."""
