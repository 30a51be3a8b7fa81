//! The stack machine of a pickle whose opcodes and names have passed the scan.

use std::{collections::HashMap, rc::Rc};

use anyhow::{bail, ensure, Context, Result};

use super::{Global, Op, StorageRef, TensorRef, Unpickled, Value};

/// The stack machine.
#[derive(Default)]
pub(super) struct Machine {
    stack: Vec<Value>,
    /// Heights of the stack at the open marks.
    marks: Vec<usize>,
    memo: HashMap<u32, Value>,
    sequences: Vec<Vec<Value>>,
    dicts: Vec<Vec<(Value, Value)>>,
    storages: Vec<StorageRef>,
    storage_of_key: HashMap<Rc<str>, usize>,
    tensors: Vec<TensorRef>,
}

impl Machine {
    /// The tables, and the value that is left on the stack.
    pub(super) fn finish(mut self) -> Result<Unpickled> {
        let root = self.pop()?;
        let Machine { sequences, dicts, storages, tensors, .. } = self;
        Ok(Unpickled { root, sequences, dicts, storages, tensors })
    }

    fn pop(&mut self) -> Result<Value> {
        let floor = self.marks.last().copied().unwrap_or(0);
        ensure!(self.stack.len() > floor, "the stack is empty");
        Ok(self.stack.pop().expect("just checked"))
    }

    fn top(&self) -> Result<&Value> {
        self.stack.last().context("the stack is empty")
    }

    /// The values above the last mark, which is closed.
    fn above_mark(&mut self) -> Result<Vec<Value>> {
        let mark = self.marks.pop().context("no mark is open")?;
        Ok(self.stack.split_off(mark))
    }

    fn push_sequence(&mut self, values: Vec<Value>) {
        self.sequences.push(values);
        self.stack.push(Value::Sequence(self.sequences.len() - 1));
    }

    fn push_dict(&mut self) {
        self.dicts.push(Vec::new());
        self.stack.push(Value::Dict(self.dicts.len() - 1));
    }

    pub(super) fn step(&mut self, op: Op) -> Result<()> {
        match op {
            Op::Protocol(_) => {}
            Op::Push(value) => self.stack.push(value),
            Op::Text(text) => self.stack.push(Value::Text(text.into())),
            Op::EmptyDict => self.push_dict(),
            Op::EmptySequence => self.push_sequence(Vec::new()),
            Op::Mark => self.marks.push(self.stack.len()),
            Op::Tuple(None) => {
                let values = self.above_mark()?;
                self.push_sequence(values);
            }
            Op::Tuple(Some(count)) => {
                let mut values = (0..count).map(|_| self.pop()).collect::<Result<Vec<_>>>()?;
                values.reverse();
                self.push_sequence(values);
            }
            Op::Put(index) => drop(self.memo.insert(index, self.top()?.clone())),
            Op::Get(index) => {
                let value = self.memo.get(&index).with_context(|| format!("memo {index} is not set"))?;
                self.stack.push(value.clone());
            }
            Op::Append => {
                let value = self.pop()?;
                self.append(vec![value])?;
            }
            Op::Appends => {
                let values = self.above_mark()?;
                self.append(values)?;
            }
            Op::SetItem => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.set_items(vec![key, value])?;
            }
            Op::SetItems => {
                let values = self.above_mark()?;
                self.set_items(values)?;
            }
            Op::Global(module, name) => {
                self.stack.push(Value::Global(Global::named(module, name).context("a name that is not accepted")?));
            }
            Op::Reduce => self.reduce()?,
            Op::Build => {
                // OrderedDicts carry `_metadata`, which is of no use here
                self.pop()?;
                ensure!(matches!(self.top()?, Value::Dict(_)), "a state for something other than a dict");
            }
            Op::PersistentId => self.storage()?,
            Op::StackGlobal | Op::Memoize | Op::Frame | Op::Stop => bail!("an opcode that the scan refuses"),
        }
        Ok(())
    }

    fn append(&mut self, values: Vec<Value>) -> Result<()> {
        let Value::Sequence(list) = *self.top()? else { bail!("an element for something other than a list") };
        self.sequences[list].extend(values);
        Ok(())
    }

    fn set_items(&mut self, values: Vec<Value>) -> Result<()> {
        let Value::Dict(dict) = *self.top()? else { bail!("an item for something other than a dict") };
        ensure!(values.len() % 2 == 0, "a key without a value");
        let mut values = values.into_iter();
        while let (Some(key), Some(value)) = (values.next(), values.next()) {
            self.dicts[dict].push((key, value));
        }
        Ok(())
    }

    fn sequence(&self, value: &Value) -> Result<&[Value]> {
        match value {
            Value::Sequence(index) => Ok(&self.sequences[*index]),
            other => bail!("expected a tuple, found {other:?}"),
        }
    }

    fn reduce(&mut self) -> Result<()> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let arguments = self.sequence(&arguments)?.to_vec();
        match function {
            Value::Global(Global::OrderedDict) => {
                ensure!(arguments.is_empty(), "an OrderedDict with arguments");
                self.push_dict();
            }
            Value::Global(Global::RebuildTensor) => {
                let tensor = self.tensor(&arguments)?;
                self.tensors.push(tensor);
                self.stack.push(Value::Tensor(self.tensors.len() - 1));
            }
            Value::Global(Global::RebuildParameter) => match arguments.first() {
                Some(tensor @ Value::Tensor(_)) => self.stack.push(tensor.clone()),
                other => bail!("a parameter of {other:?}"),
            },
            other => bail!("a call of {other:?}"),
        }
        Ok(())
    }

    /// (storage, offset, size, stride, …) of `_rebuild_tensor_v2`.
    fn tensor(&self, arguments: &[Value]) -> Result<TensorRef> {
        let [Value::Storage(storage), offset, size, stride, ..] = arguments else {
            bail!("a tensor that is not made of storage, offset, size and stride")
        };
        let counts = |value: &Value| self.sequence(value)?.iter().map(count).collect::<Result<Vec<_>>>();
        let (size, stride) = (counts(size)?, counts(stride)?);
        ensure!(size.len() == stride.len(), "a tensor with {} sizes and {} strides", size.len(), stride.len());
        Ok(TensorRef { storage: *storage, offset: count(offset)?, size, stride })
    }

    /// ('storage', type, key, location, elements[, view]) on the stack → the storage.
    fn storage(&mut self) -> Result<()> {
        let id = self.pop()?;
        let found = match self.sequence(&id)? {
            [Value::Text(tag), Value::Global(Global::Storage(kind)), Value::Text(key), Value::Text(_), elements, view @ ..]
                if **tag == *"storage" && matches!(view, [] | [Value::None]) =>
            {
                StorageRef { key: key.clone(), kind: *kind, count: count(elements)? }
            }
            other => bail!("a persistent id that is no storage: {other:?}"),
        };
        let index = match self.storage_of_key.get(&found.key) {
            Some(&index) => {
                ensure!(self.storages[index] == found, "storage {} is declared twice, differently", found.key);
                index
            }
            None => {
                self.storage_of_key.insert(found.key.clone(), self.storages.len());
                self.storages.push(found);
                self.storages.len() - 1
            }
        };
        self.stack.push(Value::Storage(index));
        Ok(())
    }
}

fn count(value: &Value) -> Result<usize> {
    match value {
        Value::Int(n) => usize::try_from(*n).with_context(|| format!("a negative number of elements: {n}")),
        other => bail!("expected a number of elements, found {other:?}"),
    }
}
