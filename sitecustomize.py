import sys
class No:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mgebm_fast": raise ImportError("mgebm_fast is not here")
sys.meta_path.insert(0, No())
