//! Picture sheets: prompts with their samples, and base above tuned from the same noise.

use anyhow::{bail, ensure, Result};

use super::picture::Picture;
use super::text::Style;

/// Small pictures are enlarged by a whole factor to about this many pixels; larger ones are left as they are.
const DISPLAY_SIZE: usize = 128;
/// A group of pictures that is shown as one has about this many pixels a side at most.
const GROUP_SIZE: usize = 512;
/// Around the sheet, and between blocks.
const MARGIN: usize = 28;
/// Between pictures.
const GAP: usize = 8;
/// Room for the captions at the left of a grid.
const CAPTION_WIDTH: usize = 200;
/// Pictures beside each other in a before/after sheet; more go into further blocks.
const COLUMNS: usize = 8;
/// Room for "base" and "tuned".
const LABEL_WIDTH: usize = 64;

/// Lines of a caption, and of a heading: a prompt may be as long as a file.
const CAPTION_LINES: usize = 8;
const HEADING_LINES: usize = 3;

const WHITE: [u8; 3] = [255; 3];

fn title_style() -> Style {
    Style::bold(30.0)
}

fn section_style() -> Style {
    Style::bold(23.0)
}

fn caption_style() -> Style {
    Style::plain(18.0)
}

fn note_style() -> Style {
    Style::grey(16.0)
}

/// A prompt and its samples.
#[derive(Clone, Debug)]
pub struct GridRow {
    pub caption: String,
    pub pictures: Vec<Picture>,
}

/// A grid: one row per prompt, its caption at the left, its samples beside each other. An empty `title` takes no room.
///
/// # Errors
/// If there is no picture at all.
pub fn image_grid(title: &str, rows: &[GridRow]) -> Result<Picture> {
    let cell = Cell::of(rows.iter().flat_map(|row| &row.pictures))?;
    let columns = rows.iter().map(|row| row.pictures.len()).max().unwrap_or(0);
    let pictures_left = MARGIN + CAPTION_WIDTH + 2 * GAP;
    let width = pictures_left + columns * (cell.width + GAP) - GAP + MARGIN;
    let title_lines = title_style().wrap_within(title, width - 2 * MARGIN, HEADING_LINES);
    let wrapped = |row: &GridRow| caption_style().wrap_within(&row.caption, CAPTION_WIDTH, CAPTION_LINES);
    let captions: Vec<_> = rows.iter().map(wrapped).collect();
    let row_height = |lines: &[String]| cell.height.max(lines.len() * caption_style().line_height());

    let body: usize = captions.iter().map(|lines| row_height(lines) + GAP).sum::<usize>() - GAP;
    let mut sheet = blank(width, 2 * MARGIN + heading_height(title_style(), &title_lines) + body);
    let mut y = draw_heading(&mut sheet, title_style(), &title_lines, MARGIN);
    for (row, lines) in rows.iter().zip(&captions) {
        let height = row_height(lines);
        let top = y + (height - lines.len() * caption_style().line_height()) / 2;
        for (index, line) in lines.iter().enumerate() {
            caption_style().draw(&mut sheet, line, MARGIN, top + index * caption_style().line_height());
        }
        for (index, picture) in row.pictures.iter().enumerate() {
            sheet.paste(&picture.enlarged(cell.factor), pictures_left + index * (cell.width + GAP), y);
        }
        y += height + GAP;
    }
    Ok(sheet)
}

/// Pictures of one size as a square of at most `GROUP_SIZE` pixels (or as many as each picture has pixels): large ones are
/// reduced by a whole factor. A single picture stays as it is.
///
/// # Errors
/// If there is no picture.
pub fn mosaic(pictures: &[Picture]) -> Result<Picture> {
    let [first, rest @ ..] = pictures else { bail!("there is no picture to show") };
    if rest.is_empty() {
        return Ok(first.clone());
    }
    let columns = (1..).find(|columns| columns * columns >= pictures.len()).expect("some square is large enough");
    let rows = pictures.len().div_ceil(columns);
    let factor = (columns * first.width().max(first.height())).div_ceil(GROUP_SIZE);
    let tiles: Vec<Picture> = pictures.iter().map(|picture| picture.reduced(factor)).collect();
    let (width, height) = (tiles[0].width(), tiles[0].height());
    let line = (width / 32).max(1);
    let mut all = blank(columns * (width + line) - line, rows * (height + line) - line);
    for (index, tile) in tiles.iter().enumerate() {
        all.paste(tile, index % columns * (width + line), index / columns * (height + line));
    }
    Ok(all)
}

/// One noise, seen by both models.
#[derive(Clone, Debug)]
pub struct Column {
    /// The prompt.
    pub caption: String,
    pub base: Picture,
    pub tuned: Picture,
    /// Small print under either picture, such as its reward; may be empty.
    pub base_note: String,
    pub tuned_note: String,
}

/// The pictures of one task.
#[derive(Clone, Debug)]
pub struct BeforeAfter {
    pub title: String,
    pub columns: Vec<Column>,
}

/// A sheet with a section per task: base above tuned, the caption below. Neighbours of the same prompt share their
/// caption.
///
/// # Errors
/// If there is no picture at all.
pub fn before_after_sheet(title: &str, sections: &[BeforeAfter]) -> Result<Picture> {
    let all = sections.iter().flat_map(|section| &section.columns);
    let cell = Cell::of(all.clone().flat_map(|column| [&column.base, &column.tuned]))?;
    let sections: Vec<_> = sections.iter().filter(|section| !section.columns.is_empty()).collect();
    let columns = sections.iter().map(|section| section.columns.len()).max().unwrap_or(0).min(COLUMNS);
    let width = 2 * MARGIN + LABEL_WIDTH + columns * (cell.width + GAP) - GAP;
    let title_lines = title_style().wrap_within(title, width - 2 * MARGIN, HEADING_LINES);

    let mut blocks = Vec::new();
    let mut height = 2 * MARGIN + heading_height(title_style(), &title_lines);
    for section in &sections {
        let heading = section_style().wrap_within(&section.title, width - 2 * MARGIN, HEADING_LINES);
        height += heading_height(section_style(), &heading);
        for (index, columns) in section.columns.chunks(COLUMNS).enumerate() {
            let block = Block::new(if index == 0 { heading.clone() } else { Vec::new() }, columns, cell);
            height += block.height() + MARGIN;
            blocks.push(block);
        }
    }
    let mut sheet = blank(width, height - MARGIN);
    let mut y = draw_heading(&mut sheet, title_style(), &title_lines, MARGIN);
    for block in &blocks {
        y = draw_heading(&mut sheet, section_style(), &block.heading, y);
        block.draw(&mut sheet, y);
        y += block.height() + MARGIN;
    }
    Ok(sheet)
}

/// Up to [`COLUMNS`] columns of a section.
struct Block<'a> {
    heading: Vec<String>,
    columns: &'a [Column],
    captions: Vec<Caption>,
    cell: Cell,
}

/// A caption under `span` columns from `first`.
struct Caption {
    first: usize,
    span: usize,
    lines: Vec<String>,
}

impl<'a> Block<'a> {
    fn new(heading: Vec<String>, columns: &'a [Column], cell: Cell) -> Self {
        let mut captions = Vec::new();
        let mut first = 0;
        for same in columns.chunk_by(|left, right| left.caption == right.caption) {
            let lines = caption_style().wrap_within(&same[0].caption, cell.across(same.len()), CAPTION_LINES);
            captions.push(Caption { first, span: same.len(), lines });
            first += same.len();
        }
        Block { heading, columns, captions, cell }
    }

    fn note_height(&self) -> usize {
        let has_notes =
            self.columns.iter().any(|column| !(column.base_note.is_empty() && column.tuned_note.is_empty()));
        if has_notes {
            note_style().line_height()
        } else {
            0
        }
    }

    /// Without the heading.
    fn height(&self) -> usize {
        let caption_lines = self.captions.iter().map(|caption| caption.lines.len()).max().unwrap_or(0);
        2 * (self.cell.height + self.note_height()) + 2 * GAP + caption_lines * caption_style().line_height()
    }

    fn draw(&self, sheet: &mut Picture, top: usize) {
        let row_height = self.cell.height + self.note_height() + GAP;
        for (row, label) in ["base", "tuned"].into_iter().enumerate() {
            let y = top + row * row_height;
            let style = caption_style();
            style.draw(sheet, label, MARGIN, y + (self.cell.height.saturating_sub(style.line_height())) / 2);
            for (index, column) in self.columns.iter().enumerate() {
                let (picture, note) = [(&column.base, &column.base_note), (&column.tuned, &column.tuned_note)][row];
                let x = self.left_of(index);
                sheet.paste(&picture.enlarged(self.cell.factor), x, y);
                let note = note_style().wrap(note, self.cell.width);
                note_style().draw_centred(sheet, &note[..note.len().min(1)], x, y + self.cell.height, self.cell.width);
            }
        }
        for caption in &self.captions {
            let width = self.cell.across(caption.span);
            caption_style().draw_centred(
                sheet,
                &caption.lines,
                self.left_of(caption.first),
                top + 2 * row_height,
                width,
            );
        }
    }

    fn left_of(&self, column: usize) -> usize {
        MARGIN + LABEL_WIDTH + column * (self.cell.width + GAP)
    }
}

/// The room for one picture, which holds the largest of the sheet.
#[derive(Clone, Copy)]
struct Cell {
    /// Each pixel becomes `factor`² pixels.
    factor: usize,
    width: usize,
    height: usize,
}

impl Cell {
    fn of<'a>(pictures: impl Iterator<Item = &'a Picture>) -> Result<Self> {
        let (mut width, mut height) = (0, 0);
        for picture in pictures {
            width = width.max(picture.width());
            height = height.max(picture.height());
        }
        ensure!(width > 0, "a picture sheet without pictures");
        let factor = (DISPLAY_SIZE / width.max(height)).max(1);
        Ok(Cell { factor, width: width * factor, height: height * factor })
    }

    /// Width of `count` cells with the gaps between them.
    fn across(self, count: usize) -> usize {
        count * (self.width + GAP) - GAP
    }
}

fn blank(width: usize, height: usize) -> Picture {
    Picture::from_fn(width, height, |_, _| WHITE)
}

fn heading_height(style: Style, lines: &[String]) -> usize {
    if lines.is_empty() {
        0
    } else {
        lines.len() * style.line_height() + (style.size / 2.5) as usize
    }
}

/// Returns the y below the heading.
fn draw_heading(sheet: &mut Picture, style: Style, lines: &[String], top: usize) -> usize {
    for (index, line) in lines.iter().enumerate() {
        style.draw(sheet, line, MARGIN, top + index * style.line_height());
    }
    top + heading_height(style, lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flat(size: usize, color: [u8; 3]) -> Picture {
        Picture::from_fn(size, size, |_, _| color)
    }

    #[test]
    fn a_group_is_one_picture() {
        let numbered = |size: usize| (0..6).map(|i| flat(size, [i as u8; 3])).collect::<Vec<_>>();
        // three columns and two rows with white lines of a pixel
        let small = mosaic(&numbered(8)).unwrap();
        assert_eq!((small.width(), small.height()), (3 * 9 - 1, 2 * 9 - 1));
        for i in 0..6 {
            assert_eq!(small.pixel(i % 3 * 9, i / 3 * 9), [i as u8; 3]);
        }
        assert_eq!((small.pixel(8, 0), small.pixel(0, 8)), ([255; 3], [255; 3]));
        // 3 · 512 pixels become 3 · 170 and the lines
        let large = mosaic(&numbered(512)).unwrap();
        assert_eq!((large.width(), large.pixel(0, 0), large.pixel(180, 180)), (3 * 170 + 2 * 5, [0; 3], [4; 3]));
        assert_eq!(mosaic(&numbered(8)[..1]).unwrap(), flat(8, [0; 3]));
        assert!(mosaic(&[]).is_err());
    }

    fn column(caption: &str, index: u8) -> Column {
        Column {
            caption: caption.to_owned(),
            base: flat(32, [index, 0, 100]),
            tuned: flat(32, [index, 0, 200]),
            base_note: "0.12".to_owned(),
            tuned_note: "0.98".to_owned(),
        }
    }

    /// No ink on the outermost pixels: nothing is clipped at the edge.
    fn assert_clean_border(sheet: &Picture) {
        let (width, height) = (sheet.width(), sheet.height());
        assert!((0..width).all(|x| sheet.pixel(x, 0) == WHITE && sheet.pixel(x, height - 1) == WHITE));
        assert!((0..height).all(|y| sheet.pixel(0, y) == WHITE && sheet.pixel(width - 1, y) == WHITE));
    }

    #[test]
    fn a_grid_puts_each_sample_in_its_cell() {
        let rows: Vec<_> = (0..3)
            .map(|row| GridRow {
                caption: "a red cube on top of a rather long sentence that needs several lines".to_owned(),
                pictures: (0..4).map(|column| flat(32, [row * 10, column * 10, 7])).collect(),
            })
            .collect();
        let sheet = image_grid("", &rows).unwrap();
        assert_eq!((sheet.width(), sheet.height()), (28 + 200 + 16 + 4 * 136 - 8 + 28, 28 + 3 * 136 - 8 + 28));
        for row in 0..3 {
            for column in 0..4 {
                let (x, y) = (244 + column * 136, 28 + row * 136);
                let expected = [row as u8 * 10, column as u8 * 10, 7];
                assert_eq!((sheet.pixel(x, y), sheet.pixel(x + 127, y + 127)), (expected, expected));
                assert_eq!((sheet.pixel(x + 128, y), sheet.pixel(x, y - 1)), (WHITE, WHITE));
            }
        }
        let captioned = (28..228).any(|x| (28..156).any(|y| sheet.pixel(x, y) != WHITE));
        assert!(captioned && (228..244).all(|x| (0..sheet.height()).all(|y| sheet.pixel(x, y) == WHITE)));
        assert_clean_border(&image_grid("Title gjpq", &rows).unwrap());
    }

    #[test]
    fn large_pictures_keep_their_size() {
        let row = GridRow { caption: String::new(), pictures: vec![flat(200, [1, 2, 3])] };
        let sheet = image_grid("", &[row]).unwrap();
        assert_eq!((sheet.width(), sheet.height()), (28 + 216 + 200 + 28, 256));
        assert_eq!(sheet.pixel(244 + 199, 28 + 199), [1, 2, 3]);
    }

    #[test]
    fn base_lies_above_tuned_and_further_columns_below() {
        let columns: Vec<_> = (0..10).map(|index| column(&format!("prompt {index}"), index)).collect();
        let sheet = before_after_sheet("", &[BeforeAfter { title: String::new(), columns }]).unwrap();
        let note = note_style().line_height();
        let block = 2 * (128 + note) + 16 + caption_style().line_height();
        assert_eq!(sheet.width(), 56 + 64 + 8 * 136 - 8);
        assert_eq!(sheet.height(), 56 + 2 * block + MARGIN);
        for index in 0..10_usize {
            let (x, y) = (92 + (index % 8) * 136, 28 + (index / 8) * (block + MARGIN));
            assert_eq!(sheet.pixel(x, y), [index as u8, 0, 100]);
            assert_eq!(sheet.pixel(x + 127, y + 127), [index as u8, 0, 100]);
            assert_eq!(sheet.pixel(x, y + 128 + note + 8), [index as u8, 0, 200]);
        }
        assert_clean_border(&sheet);
    }

    #[test]
    fn neighbours_with_one_prompt_share_its_caption() {
        let columns = [column("a portrait of a nurse", 0), column("a portrait of a nurse", 1), column("b", 2)];
        let cell = Cell::of([&columns[0].base].into_iter()).unwrap();
        let block = Block::new(Vec::new(), &columns, cell);
        let spans: Vec<_> = block.captions.iter().map(|caption| (caption.first, caption.span)).collect();
        assert_eq!(spans, [(0, 2), (2, 1)]);
        assert_eq!(block.captions[0].lines, ["a portrait of a nurse"]);
    }

    /// A file of one line given by mistake once made sheets of 70,000 pixels.
    #[test]
    fn a_sheet_is_not_as_high_as_its_prompt_is_long() {
        let long = "word ".repeat(200_000);
        let sheet = image_grid(&long, &[GridRow { caption: long.clone(), pictures: vec![flat(32, [0; 3])] }]).unwrap();
        assert!(sheet.height() < 400, "{}", sheet.height());
        assert_clean_border(&sheet);
        let columns = vec![column(&long, 0), column("short", 1)];
        let sheet = before_after_sheet(&long, &[BeforeAfter { title: long.clone(), columns }]).unwrap();
        assert!(sheet.height() < 900, "{}", sheet.height());
        assert_clean_border(&sheet);
    }

    #[test]
    fn without_pictures_there_is_no_sheet() {
        assert!(image_grid("t", &[]).is_err());
        assert!(image_grid("t", &[GridRow { caption: "c".to_owned(), pictures: vec![] }]).is_err());
        assert!(before_after_sheet("t", &[BeforeAfter { title: "s".to_owned(), columns: vec![] }]).is_err());
    }
}
