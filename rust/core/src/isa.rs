//! Which instruction set runs: found once, handed to every kernel as a token.

/// An instruction set that this processor has. Only [`Isa::get`] makes one, which is what makes the dispatch sound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa(pub(crate) Set);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Set {
    Baseline,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Isa {
    /// The best instruction set of this processor; `FUTUREFILL_ISA=baseline|avx2` asks for a lesser one.
    pub fn get() -> Self {
        static BEST: std::sync::OnceLock<Isa> = std::sync::OnceLock::new();
        *BEST.get_or_init(|| {
            let all = Self::available();
            let wish = std::env::var("FUTUREFILL_ISA").unwrap_or_default();
            all.iter().copied().find(|isa| isa.name() == wish).unwrap_or(all[all.len() - 1])
        })
    }

    /// Every instruction set that this processor has, weakest first.
    pub fn available() -> Vec<Self> {
        #[allow(unused_mut)]
        let mut all = vec![Isa(Set::Baseline)];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                all.push(Isa(Set::Avx2));
                if is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512bw")
                {
                    all.push(Isa(Set::Avx512));
                }
            }
        }
        all
    }

    #[cfg(target_arch = "x86_64")]
    pub(crate) fn set(self) -> Set {
        self.0
    }

    pub fn name(self) -> &'static str {
        match self.0 {
            #[cfg(target_arch = "aarch64")]
            Set::Baseline => "neon",
            #[cfg(not(target_arch = "aarch64"))]
            Set::Baseline => "baseline",
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => "avx512",
        }
    }
}
