//! The opcodes that torch writes, read off a byte string, and the scan that refuses all else.

use anyhow::{bail, ensure, Context, Result};

use super::{Global, Value};

/// One step of the stack machine.
#[derive(Debug)]
pub(super) enum Op<'a> {
    Protocol(u8),
    Push(Value),
    Text(&'a str),
    EmptyDict,
    EmptySequence,
    Mark,
    /// A tuple of the values above the mark, or of the last n.
    Tuple(Option<usize>),
    Put(u32),
    Get(u32),
    Append,
    Appends,
    SetItem,
    SetItems,
    Global(&'a str, &'a str),
    Reduce,
    Build,
    PersistentId,
    Stop,
    /// Names an object by the two texts last pushed; never accepted, but named in the refusal.
    StackGlobal,
    Memoize,
    Frame,
}

/// Reads opcodes off a byte string.
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Reader { bytes, at: 0 }
    }

    /// Bytes read so far.
    pub(super) fn at(&self) -> usize {
        self.at
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        let end = self.at.checked_add(count).filter(|&end| end <= self.bytes.len());
        let end = end.with_context(|| format!("the pickle ends inside an opcode, at byte {}", self.bytes.len()))?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8> {
        Ok(self.take(1)?[0])
    }

    fn u16(&mut self) -> Result<u16> {
        Ok(u16::from_le_bytes(self.take(2)?.try_into()?))
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.take(4)?.try_into()?))
    }

    fn text(&mut self, length: usize) -> Result<&'a str> {
        let at = self.at;
        std::str::from_utf8(self.take(length)?).with_context(|| format!("text at byte {at} of the pickle"))
    }

    fn line(&mut self) -> Result<&'a str> {
        let rest = &self.bytes[self.at..];
        let end = rest.iter().position(|&b| b == b'\n').context("the pickle ends inside a name")?;
        let line = self.text(end)?;
        self.at += 1;
        Ok(line)
    }

    fn integer(&mut self, length: usize) -> Result<Value> {
        let bytes = self.take(length)?;
        if bytes.len() > 8 {
            return Ok(Value::LargeInt(bytes.into()));
        }
        let mut wide = [if bytes.last().is_some_and(|b| b & 0x80 != 0) { 0xff } else { 0 }; 8];
        wide[..bytes.len()].copy_from_slice(bytes);
        Ok(Value::Int(i64::from_le_bytes(wide)))
    }

    pub(super) fn next(&mut self) -> Result<Op<'a>> {
        let at = self.at;
        Ok(match self.byte()? {
            0x80 => Op::Protocol(self.byte()?),
            b'}' => Op::EmptyDict,
            b']' => Op::EmptySequence,
            b')' => Op::Tuple(Some(0)),
            0x85 => Op::Tuple(Some(1)),
            0x86 => Op::Tuple(Some(2)),
            0x87 => Op::Tuple(Some(3)),
            b't' => Op::Tuple(None),
            b'(' => Op::Mark,
            b'q' => Op::Put(u32::from(self.byte()?)),
            b'r' => Op::Put(self.u32()?),
            b'h' => Op::Get(u32::from(self.byte()?)),
            b'j' => Op::Get(self.u32()?),
            b'X' | b'T' => {
                let length = self.u32()? as usize;
                Op::Text(self.text(length)?)
            }
            b'U' | 0x8c => {
                let length = usize::from(self.byte()?);
                Op::Text(self.text(length)?)
            }
            b'J' => Op::Push(Value::Int(i64::from(self.u32()? as i32))),
            b'K' => Op::Push(Value::Int(i64::from(self.byte()?))),
            b'M' => Op::Push(Value::Int(i64::from(self.u16()?))),
            0x8a => {
                let length = usize::from(self.byte()?);
                Op::Push(self.integer(length)?)
            }
            b'G' => Op::Push(Value::Float(f64::from_be_bytes(self.take(8)?.try_into()?))),
            0x88 => Op::Push(Value::Bool(true)),
            0x89 => Op::Push(Value::Bool(false)),
            b'N' => Op::Push(Value::None),
            b'a' => Op::Append,
            b'e' => Op::Appends,
            b's' => Op::SetItem,
            b'u' => Op::SetItems,
            // `i` makes an instance of the class it names; [`scan`] sees to the name
            b'c' | b'i' => Op::Global(self.line()?, self.line()?),
            0x93 => Op::StackGlobal,
            0x94 => Op::Memoize,
            0x95 => self.take(8).map(|_| Op::Frame)?,
            b'R' => Op::Reduce,
            b'b' => Op::Build,
            b'Q' => Op::PersistentId,
            b'.' => Op::Stop,
            other => bail!("opcode 0x{other:02x} at byte {at} of the pickle is not one that torch.save writes"),
        })
    }
}

/// Walks the pickle at the start of `bytes` without building anything; its length in bytes.
///
/// # Errors
/// Names the first object outside the accepted ones, else the first opcode that torch does not write.
pub fn scan(bytes: &[u8]) -> Result<usize> {
    let mut reader = Reader::new(bytes);
    let mut texts = ["?"; 2];
    let mut protocol = 0;
    loop {
        let at = reader.at;
        match reader.next()? {
            Op::Protocol(version) => protocol = version,
            Op::Text(text) => texts = [texts[1], text],
            Op::StackGlobal => bail!("the pickle asks for {}.{}, which is not accepted", texts[0], texts[1]),
            Op::Global(module, name) if Global::named(module, name).is_none() || bytes[at] == b'i' => {
                bail!("the pickle asks for {module}.{name}, which is not accepted")
            }
            Op::Memoize | Op::Frame if protocol > 2 => {}
            Op::Memoize | Op::Frame => bail!("opcode 0x{:02x} at byte {at} does not belong to protocol 2", bytes[at]),
            Op::Stop => break,
            _ => {}
        }
    }
    ensure!(protocol == 2, "the pickle has protocol {protocol}; torch.save writes 2");
    Ok(reader.at)
}
