//! llm-d's block keys, so that answers can be compared with its indexer and its routers can ask
//! this one.
//!
//! Three chains, each with llm-d's own definition of root and step. Only the first two name blocks
//! of tokens exactly; the third belongs to its approximate producer, which hashes the last partial
//! block, too.

use xxhash_rust::xxh64::{Xxh64, xxh64};

/// llm-d's default: FNV-64a over canonical CBOR of `[parent, tokens, extra]`.
pub fn cbor_fnv(seed: &str, model: &str, tokens: &[u32], block: usize) -> Vec<u64> {
    let start = fnv64a(FNV_OFFSET, seed.as_bytes());
    let mut bytes = Vec::new();
    let mut step = |parent: u64, tokens: Option<&[u32]>, extra: Option<&str>| {
        bytes.clear();
        cbor_head(&mut bytes, 4, 3);
        cbor_head(&mut bytes, 0, parent);
        match tokens {
            None => bytes.push(CBOR_NULL),
            Some(tokens) => {
                cbor_head(&mut bytes, 4, tokens.len() as u64);
                for token in tokens {
                    cbor_head(&mut bytes, 0, (*token).into());
                }
            }
        }
        match extra {
            None => bytes.push(CBOR_NULL),
            Some(text) => {
                cbor_head(&mut bytes, 3, text.len() as u64);
                bytes.extend_from_slice(text.as_bytes());
            }
        }
        fnv64a(FNV_OFFSET, &bytes)
    };
    let root = step(start, None, Some(model));
    chain(root, tokens, block, |parent, tokens| step(parent, Some(tokens), None))
}

/// llm-d's faster chain: XXH64 over the parent and the tokens.
pub fn xxh64_chain(seed: &str, model: &str, tokens: &[u32], block: usize) -> Vec<u64> {
    let start = xxh64(seed.as_bytes(), 0);
    let step = |parent: u64, tokens: &[u32], extra: Option<&str>| {
        let mut hash = Xxh64::new(0);
        hash.update(&parent.to_le_bytes());
        for token in tokens {
            hash.update(&token.to_le_bytes());
        }
        if let Some(text) = extra {
            hash.update(&(text.len() as u64).to_le_bytes());
            hash.update(text.as_bytes());
        }
        hash.digest()
    };
    let root = step(start, &[], Some(model));
    chain(root, tokens, block, |parent, tokens| step(parent, tokens, None))
}

/// The chain of llm-d's approximate producer; the partial last block counts.
pub fn approximate(model: &str, cache_salt: &str, tokens: &[u32], block: usize) -> Vec<u64> {
    let root = xxh64(format!("{model}{cache_salt}").as_bytes(), 0);
    let mut parent = root;
    let step = |tokens: &[u32]| {
        let bytes: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
        let content = xxh64(&bytes, 0);
        parent = xxh64(&[content.to_le_bytes(), parent.to_le_bytes()].concat(), 0);
        parent
    };
    tokens.chunks(block).map(step).collect()
}

fn chain(root: u64, tokens: &[u32], block: usize, mut step: impl FnMut(u64, &[u32]) -> u64) -> Vec<u64> {
    let mut parent = root;
    let mut next = |tokens: &[u32]| {
        parent = step(parent, tokens);
        parent
    };
    tokens.chunks_exact(block).map(&mut next).collect()
}

const FNV_OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
const CBOR_NULL: u8 = 0xf6;

fn fnv64a(start: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(start, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

/// Major type and argument in the shortest form, as canonical CBOR wants it.
fn cbor_head(bytes: &mut Vec<u8>, major: u8, value: u64) {
    let major = major << 5;
    match value {
        0..=23 => bytes.push(major | value as u8),
        24..=0xff => bytes.extend([major | 0x18, value as u8]),
        0x100..=0xffff => {
            bytes.push(major | 0x19);
            bytes.extend((value as u16).to_be_bytes());
        }
        0x1_0000..=0xffff_ffff => {
            bytes.push(major | 0x1a);
            bytes.extend((value as u32).to_be_bytes());
        }
        _ => {
            bytes.push(major | 0x1b);
            bytes.extend(value.to_be_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKENS: [u32; 10] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10];

    #[test]
    fn the_published_vectors_match() {
        let eight = &TOKENS[..8];
        assert_eq!(cbor_fnv("", "m", eight, 4), [14_686_617_092_727_577_033, 9_856_792_211_163_113_858]);
        assert_eq!(xxh64_chain("", "m", eight, 4), [6_079_057_133_344_773_006, 10_407_153_327_552_680_244]);
        assert_eq!(
            approximate("m", "", &TOKENS, 4),
            [18_390_267_952_832_273_189, 15_051_379_317_946_961_216, 7_786_504_833_879_382_867]
        );
    }
}
