//! Reading msgpack from bytes that nobody vouches for.
//!
//! A cursor over one payload. Promises: no panic, no allocation, no recursion deeper than
//! [`limits::MSGPACK_DEPTH_MAX`], and a length is believed only as far as there are bytes for it.

use rmp::Marker;

use crate::limits;

/// Why bytes could not be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// The payload ends within a value.
    #[error("it ends within a value")]
    Short,
    /// A value of another type was expected here.
    #[error("a value has the wrong type or range")]
    Type,
    /// Arrays within arrays without end.
    #[error("it is nested too deeply")]
    Depth,
    /// There are bytes after the end.
    #[error("bytes follow after its end")]
    Surplus,
}

type Reader<T> = Result<T, Malformed>;

/// The largest number that is its own marker.
const FIX_POS_MAX: u8 = 0x7f;
/// The marker of a number of one byte; those of two and four bytes follow.
const U8_MARKER: u8 = 0xcc;

/// A position in a payload.
#[derive(Debug, Clone, Copy)]
pub struct Cursor<'a> {
    rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    /// At the start.
    pub fn new(payload: &'a [u8]) -> Self {
        Self { rest: payload }
    }

    /// Nothing is left.
    pub fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    fn take(&mut self, len: usize) -> Reader<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(len).ok_or(Malformed::Short)?;
        self.rest = rest;
        Ok(taken)
    }

    fn fixed<const N: usize>(&mut self) -> Reader<[u8; N]> {
        let (taken, rest) = self.rest.split_first_chunk::<N>().ok_or(Malformed::Short)?;
        self.rest = rest;
        Ok(*taken)
    }

    fn marker(&mut self) -> Reader<Marker> {
        Ok(Marker::from_u8(self.fixed::<1>()?[0]))
    }

    /// Length of a string, byte string, array or map with this many bytes of length.
    fn len(&mut self, width: u8) -> Reader<usize> {
        Ok(match width {
            1 => usize::from(self.fixed::<1>()?[0]),
            2 => usize::from(u16::from_be_bytes(self.fixed()?)),
            _ => u32::from_be_bytes(self.fixed()?) as usize,
        })
    }

    /// Consumes nil, if that is what comes.
    pub fn nil(&mut self) -> bool {
        match self.rest.split_first() {
            Some((0xc0, rest)) => {
                self.rest = rest;
                true
            }
            _ => false,
        }
    }

    /// Elements of the array that starts here: never more than bytes are left.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn array(&mut self) -> Reader<usize> {
        let len = match self.marker()? {
            Marker::FixArray(len) => usize::from(len),
            Marker::Array16 => self.len(2)?,
            Marker::Array32 => self.len(4)?,
            _ => return Err(Malformed::Type),
        };
        if len > self.rest.len() { Err(Malformed::Short) } else { Ok(len) }
    }

    /// Pairs of the map that starts here: never more than bytes are left for.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn map(&mut self) -> Reader<usize> {
        let len = match self.marker()? {
            Marker::FixMap(len) => usize::from(len),
            Marker::Map16 => self.len(2)?,
            Marker::Map32 => self.len(4)?,
            _ => return Err(Malformed::Type),
        };
        if len > self.rest.len() / 2 { Err(Malformed::Short) } else { Ok(len) }
    }

    /// Is a map next, and not an array?
    pub fn at_map(&self) -> bool {
        self.rest
            .first()
            .is_some_and(|byte| matches!(Marker::from_u8(*byte), Marker::FixMap(_) | Marker::Map16 | Marker::Map32))
    }

    /// An integer; negative ones as the unsigned number with the same bits.
    ///
    /// # Errors
    /// [`Malformed`].
    #[inline]
    pub fn integer(&mut self) -> Reader<u64> {
        Ok(match self.marker()? {
            Marker::FixPos(value) => value.into(),
            Marker::U8 => self.fixed::<1>()?[0].into(),
            Marker::U16 => u16::from_be_bytes(self.fixed()?).into(),
            Marker::U32 => u32::from_be_bytes(self.fixed()?).into(),
            Marker::U64 => u64::from_be_bytes(self.fixed()?),
            Marker::FixNeg(value) => i64::from(value).cast_unsigned(),
            Marker::I8 => i64::from(i8::from_be_bytes(self.fixed()?)).cast_unsigned(),
            Marker::I16 => i64::from(i16::from_be_bytes(self.fixed()?)).cast_unsigned(),
            Marker::I32 => i64::from(i32::from_be_bytes(self.fixed()?)).cast_unsigned(),
            Marker::I64 => i64::from_be_bytes(self.fixed()?).cast_unsigned(),
            _ => return Err(Malformed::Type),
        })
    }

    /// An integer that fits into 32 bits.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn small(&mut self) -> Reader<u32> {
        u32::try_from(self.integer()?).map_err(|_| Malformed::Type)
    }

    /// Appends an array of numbers of at most 32 bits.
    ///
    /// # Errors
    /// [`Malformed`]; what was appended by then stays.
    pub fn smalls(&mut self, into: &mut Vec<u32>) -> Reader<()> {
        let mut left = self.array()?;
        into.reserve(left);
        while left > 0 {
            left -= self.short_run(left, into);
            if left > 0 {
                into.push(self.small()?);
                left -= 1;
            }
        }
        Ok(())
    }

    /// Appends up to `most` numbers, and says how many: as long as they are unsigned, of at most 32
    /// bits, and 8 bytes are left. Common token ids take one, three or five bytes in an order that
    /// no processor foresees, so that the width is computed instead of branched upon.
    fn short_run(&mut self, most: usize, into: &mut Vec<u32>) -> usize {
        let before = into.len();
        let mut rest = self.rest;
        into.extend(
            std::iter::from_fn(|| {
                let word = u64::from_be_bytes(*rest.first_chunk()?);
                let marker = (word >> 56) as u8;
                let exponent = marker.wrapping_sub(U8_MARKER);
                let is_wide = exponent <= 2;
                if marker > FIX_POS_MAX && !is_wide {
                    return None;
                }
                let payload = if is_wide { 1 << (exponent & 3) } else { 0_u32 };
                rest = &rest[1 + payload as usize..];
                let value = if is_wide { word << 8 >> (64 - 8 * payload) } else { word >> 56 };
                Some(value as u32)
            })
            .take(most),
        );
        self.rest = rest;
        into.len() - before
    }

    /// A float, or an integer in its place.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn float(&mut self) -> Reader<f64> {
        let start = *self;
        match self.marker()? {
            Marker::F64 => Ok(f64::from_be_bytes(self.fixed()?)),
            Marker::F32 => Ok(f32::from_be_bytes(self.fixed()?).into()),
            _ => {
                *self = start;
                Ok(self.integer()?.cast_signed() as f64)
            }
        }
    }

    /// A string.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn text(&mut self) -> Reader<&'a str> {
        let len = match self.marker()? {
            Marker::FixStr(len) => usize::from(len),
            Marker::Str8 => self.len(1)?,
            Marker::Str16 => self.len(2)?,
            Marker::Str32 => self.len(4)?,
            _ => return Err(Malformed::Type),
        };
        std::str::from_utf8(self.take(len)?).map_err(|_| Malformed::Type)
    }

    /// A byte string.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn bytes(&mut self) -> Reader<&'a [u8]> {
        let len = match self.marker()? {
            Marker::Bin8 => self.len(1)?,
            Marker::Bin16 => self.len(2)?,
            Marker::Bin32 => self.len(4)?,
            _ => return Err(Malformed::Type),
        };
        self.take(len)
    }

    /// Passes over one value of any kind and gives its bytes.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn skip(&mut self) -> Reader<&'a [u8]> {
        let start = self.rest;
        self.pass(limits::MSGPACK_DEPTH_MAX)?;
        Ok(&start[..start.len() - self.rest.len()])
    }

    fn pass(&mut self, depth: usize) -> Reader<()> {
        let bytes = match self.marker()? {
            Marker::FixPos(_) | Marker::FixNeg(_) | Marker::Null | Marker::True | Marker::False => 0,
            Marker::U8 | Marker::I8 => 1,
            Marker::U16 | Marker::I16 | Marker::FixExt1 => 2,
            Marker::U32 | Marker::I32 | Marker::F32 => 4,
            Marker::U64 | Marker::I64 | Marker::F64 => 8,
            Marker::FixStr(len) => len.into(),
            Marker::Str8 | Marker::Bin8 => self.len(1)?,
            Marker::Str16 | Marker::Bin16 => self.len(2)?,
            Marker::Str32 | Marker::Bin32 => self.len(4)?,
            Marker::FixExt2 => 3,
            Marker::FixExt4 => 5,
            Marker::FixExt8 => 9,
            Marker::FixExt16 => 17,
            Marker::Ext8 => self.len(1)? + 1,
            Marker::Ext16 => self.len(2)? + 1,
            Marker::Ext32 => self.len(4)? + 1,
            Marker::FixArray(len) => return self.pass_values(len.into(), depth),
            Marker::Array16 => return self.len(2).and_then(|len| self.pass_values(len, depth)),
            Marker::Array32 => return self.len(4).and_then(|len| self.pass_values(len, depth)),
            Marker::FixMap(len) => return self.pass_values(2 * usize::from(len), depth),
            Marker::Map16 => return self.len(2).and_then(|len| self.pass_values(2 * len, depth)),
            Marker::Map32 => return self.len(4).and_then(|len| self.pass_values(2 * len, depth)),
            Marker::Reserved => return Err(Malformed::Type),
        };
        self.take(bytes).map(drop)
    }

    fn pass_values(&mut self, count: usize, depth: usize) -> Reader<()> {
        let depth = depth.checked_sub(1).ok_or(Malformed::Depth)?;
        (0..count).try_for_each(|_| self.pass(depth))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_lengths_are_refused_before_anything_is_reserved() {
        for bytes in [&[0xdd, 0xff, 0xff, 0xff, 0xff][..], &[0xdc, 0x00, 0x05, 0x01], &[0x95, 1]] {
            assert_eq!(Cursor::new(bytes).array(), Err(Malformed::Short), "{bytes:x?}");
            let mut tokens = Vec::new();
            assert_eq!(Cursor::new(bytes).smalls(&mut tokens), Err(Malformed::Short));
            assert_eq!(tokens.capacity(), 0);
            assert!(Cursor::new(bytes).skip().is_err());
        }
        assert_eq!(Cursor::new(&[0xdf, 0xff, 0xff, 0xff, 0xff]).map(), Err(Malformed::Short));
        assert_eq!(Cursor::new(&[0xdb, 0xff, 0xff, 0xff, 0xff, b'a']).text(), Err(Malformed::Short));
        assert_eq!(Cursor::new(&[0x91; 1000]).skip(), Err(Malformed::Depth));
    }

    #[test]
    fn every_width_of_number_is_read() {
        let mut bytes = Vec::new();
        let numbers = [0_u64, 127, 128, 255, 256, 65_535, 65_536, u64::from(u32::MAX), 1 << 32, u64::MAX];
        for number in numbers {
            rmp::encode::write_uint(&mut bytes, number).expect("memory");
        }
        let mut cursor = Cursor::new(&bytes);
        assert_eq!(numbers.map(|_| cursor.integer().expect("a number")), numbers);
        for number in [-1_i64, -32, -33, -128, -129, -32_769, i64::MIN] {
            let mut bytes = Vec::new();
            rmp::encode::write_sint(&mut bytes, number).expect("memory");
            assert_eq!(Cursor::new(&bytes).integer(), Ok(number.cast_unsigned()));
            assert_eq!(Cursor::new(&bytes).skip().map(<[u8]>::len), Ok(bytes.len()));
        }
    }
}
