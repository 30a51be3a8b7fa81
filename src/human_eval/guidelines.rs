//! What raters read before they answer: the built-in guidelines with worked examples, or a user's own in Markdown.
//!
//! A user's text becomes HTML that can do nothing: HTML in it is shown as it is written, pictures as their descriptions
//! (the pages load nothing from elsewhere), links lead to the web or to a mail address or are words.

use std::{fs, path::Path};

use anyhow::{ensure, Context, Result};
use pulldown_cmark::{html, Event, HeadingLevel, Options, Parser, Tag, TagEnd};

use crate::text_file;

/// Bytes of a user's guidelines: some forty pages of text.
const MOST: u64 = 128 << 10;

/// The text of a user's guidelines.
///
/// # Errors
/// A file that is not there, is not text in UTF-8, is too big, or shows nothing.
pub fn read(path: &Path) -> Result<String> {
    let shown = path.display();
    let size = fs::metadata(path).with_context(|| format!("cannot read {shown}"))?.len();
    let fits = |size: u64| {
        ensure!(size <= MOST, "{shown} has {size} bytes, guidelines have at most {MOST}: no rater would read more");
        Ok(())
    };
    fits(size)?;
    let bytes = text_file::bytes(path)?;
    fits(bytes.len() as u64)?;
    let text = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to() + 1;
        anyhow::anyhow!("{shown}: byte {at} is not UTF-8: save it as UTF-8")
    })?;
    ensure!(!text.contains('\0'), "{shown} holds a NUL character: guidelines are text in Markdown");
    ensure!(!Page::of(&text).html.trim().is_empty(), "{shown} is empty: raters would read nothing");
    Ok(text)
}

/// Guidelines as HTML, and what was left out of it.
#[derive(Debug, PartialEq)]
pub struct Page {
    pub html: String,
    /// Pictures that are words now, links that are, and pieces of HTML that are shown as they are written.
    pub pictures: usize,
    pub links: usize,
    pub pieces_of_html: usize,
}

impl Page {
    /// From Markdown (CommonMark with tables). Its headings begin one level below the page's own.
    pub fn of(markdown: &str) -> Self {
        let (mut pictures, mut links, mut pieces_of_html) = (0, 0, 0);
        let mut in_bare_link = false;
        let events = Parser::new_ext(markdown, Options::ENABLE_TABLES | Options::ENABLE_STRIKETHROUGH);
        let events = events.filter_map(|event| {
            Some(match event {
                Event::Html(html) | Event::InlineHtml(html) => {
                    pieces_of_html += 1;
                    Event::Text(html)
                }
                Event::Start(Tag::HtmlBlock) => Event::Start(Tag::Paragraph),
                Event::End(TagEnd::HtmlBlock) => Event::End(TagEnd::Paragraph),
                Event::Start(Tag::Image { .. }) => {
                    pictures += 1;
                    return None;
                }
                Event::End(TagEnd::Image) => return None,
                Event::Start(Tag::Link { ref dest_url, .. }) if !leads_out(dest_url) => {
                    links += 1;
                    in_bare_link = true;
                    return None;
                }
                Event::End(TagEnd::Link) if in_bare_link => {
                    in_bare_link = false;
                    return None;
                }
                Event::Start(Tag::Heading { level, .. }) => {
                    Event::Start(Tag::Heading { level: below(level), id: None, classes: Vec::new(), attrs: Vec::new() })
                }
                Event::End(TagEnd::Heading(level)) => Event::End(TagEnd::Heading(below(level))),
                other => other,
            })
        });
        let mut page = String::new();
        html::push_html(&mut page, events);
        Page { html: page, pictures, links, pieces_of_html }
    }

    /// What raters will not see as it was meant, in a sentence; `None` where there is nothing of the kind.
    pub fn departures(&self) -> Option<String> {
        let counted = |count: usize, one: &str, more: &str, what: &str| {
            (count > 0).then(|| format!("{count} {} {what}", if count == 1 { one } else { more }))
        };
        let all: Vec<String> = [
            counted(
                self.pictures,
                "picture is",
                "pictures are",
                "shown as words: the pages load nothing from elsewhere",
            ),
            counted(
                self.links,
                "link is",
                "links are",
                "shown as words: they lead neither to the web nor to a mail address",
            ),
            counted(
                self.pieces_of_html,
                "piece of HTML is",
                "pieces of HTML are",
                "shown as written: guidelines are Markdown",
            ),
        ]
        .into_iter()
        .flatten()
        .collect();
        (!all.is_empty()).then(|| all.join("; "))
    }
}

fn leads_out(address: &str) -> bool {
    ["http://", "https://", "mailto:"]
        .iter()
        .any(|scheme| address.get(..scheme.len()).is_some_and(|start| start.eq_ignore_ascii_case(scheme)))
}

fn below(level: HeadingLevel) -> HeadingLevel {
    HeadingLevel::try_from(level as usize + 1).unwrap_or(HeadingLevel::H6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markdown_becomes_a_page() {
        let page = Page::of(
            "# How to\n\nLook at **hands** & faces:\n\n- five fingers\n\n[more](https://example.org/a?b=1&c)\n",
        );
        assert_eq!(
            page.html,
            "<h2>How to</h2>\n<p>Look at <strong>hands</strong> &amp; faces:</p>\n<ul>\n<li>five fingers</li>\n</ul>\n\
             <p><a href=\"https://example.org/a?b=1&amp;c\">more</a></p>\n"
        );
        assert_eq!(page.departures(), None);
        assert!(Page::of("| a | b |\n|---|---|\n| 1 | 2 |\n").html.contains("<td>1</td>"));
        assert!(Page::of("###### deep").html.contains("<h6>deep</h6>"));
    }

    /// Whatever a text tries, the page has only tags that Markdown makes, and addresses of the web.
    #[test]
    fn nothing_in_it_acts_or_loads() {
        let text = "<script>alert(1)</script>\n\n</template><img src=x onerror=alert(1)>\n\nin <b onclick=x>line</b>\n\n\
                    [a](javascript:alert(1)) [b](JaVaScRiPt:alert(1)) [c](data:text/html,x) <javascript:alert(1)> [d](x.html)\n\n\
                    ![a picture](https://example.org/track.png) [![in a link](y.png)](file:///etc/passwd)\n\n\
                    [q](<https://example.org/\"onmouseover=\"x> \"t\\\" onmouseover=\\\"x\")\n\n`<i>` \n\n    <u>code</u>\n";
        let page = Page::of(text);
        let mut tags: Vec<&str> = page.html.split('<').skip(1).map(|rest| rest.split('>').next().unwrap()).collect();
        tags.retain(|tag| !["p", "/p", "code", "/code", "pre", "/pre", "/a"].contains(tag));
        assert_eq!(tags.len(), 1, "{tags:?}");
        let quotes = tags[0].matches('"').count();
        assert!(tags[0].starts_with("a href=\"https://example.org/") && quotes == 4, "{}", tags[0]);
        assert_eq!((page.pictures, page.links), (2, 6));
        assert!(page.html.contains("a picture") && page.html.contains("in a link"), "{}", page.html);
        let said = page.departures().unwrap();
        assert!(said.starts_with("2 pictures are shown as words") && said.contains("; 6 links are"), "{said}");
    }

    #[test]
    fn what_is_no_text_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("own.md");
        let error = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            format!("{:#}", read(&path).unwrap_err())
        };
        assert!(error(b"").ends_with("own.md is empty: raters would read nothing"));
        assert!(error(b" \n \n").contains("own.md is empty"));
        assert!(error(b"[a]: https://example.org\n").contains("own.md is empty"));
        assert!(error(b"good \xff bad").ends_with("own.md: byte 6 is not UTF-8: save it as UTF-8"));
        assert!(error(b"\xff\xfeh\0").contains("own.md is in UTF-16"));
        assert!(error(b"a\0b").contains("holds a NUL character"));
        assert!(
            error(&vec![b'x'; (128 << 10) + 1]).ends_with("guidelines have at most 131072: no rater would read more")
        );
        assert!(error(b"<!doctype html><p>x").contains("own.md is a web page"));
        fs::write(&path, b"\xef\xbb\xbfBegin").unwrap();
        assert_eq!(read(&path).unwrap(), "Begin");
        let absent = format!("{:#}", read(&folder.path().join("absent.md")).unwrap_err());
        assert!(absent.contains("cannot read") && absent.contains("absent.md"), "{absent}");
    }
}
