from ..kernels.watch import Watch as _W
class ModuleFingerprint(_W):
    def matches(self): return self.holds()
