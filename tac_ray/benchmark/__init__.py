"""The paper's tables on its data sets, and on any folder with one folder a class."""
