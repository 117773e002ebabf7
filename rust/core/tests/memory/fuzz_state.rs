//! What an attacker can write into a saved state is an error, never a panic or an allocation without bound.

use crate::common::cases;
use crate::{HELD, MOST, hostile};
use proptest::prelude::*;

/// A few caches of the honest size, with plans, states and room to work.
const SPARE: usize = 16 << 20;

proptest! {
    #![proptest_config(cases(4000))]

    #[test]
    fn hostile_states(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
        let before = HELD.get();
        MOST.set(before);
        let honest = hostile::load(&bytes);
        let most = (MOST.get() - before) as usize;
        prop_assert!(most <= SPARE + 20 * honest, "{most} bytes held at once; an honest cache takes {honest}");
    }
}
