//! Any bytes as an extent's descriptor of any number of ranks: no panic. The first byte is the
//! number of ranks.
#![no_main]

use kvcellar_block::descriptor;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Some((ranks, page)) = bytes.split_first() else { return };
    let ranks = usize::from(*ranks % 65);
    let read = descriptor::read(page, ranks);
    if let Ok((key, _, sums)) = descriptor::unseal(page, ranks) {
        assert_eq!(sums.len(), ranks);
        // The key is found even where the lora name is no text, which only `read` minds.
        assert!(read.is_err() || read.is_ok_and(|(found, _, _)| found == key));
    }
});
