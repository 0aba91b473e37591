package quotahttp

import (
	"encoding/json"
	"mime"
	"net/http"
	"strings"
)

// Usage is the tokens that an answer says were used. Input leaves out the tokens of the two caches.
type Usage struct {
	Input, Output         int64
	CacheRead, CacheWrite int64
}

// Tokens returns the sum.
func (u Usage) Tokens() int64 { return u.Input + u.Output + u.CacheRead + u.CacheWrite }

// Bounds of the memory that looking at an answer takes.
const (
	maxDocument = 1 << 20 // of a document for Options.ReadUsage
	maxCounts   = 1 << 13 // of the object with the counts
	maxTokens   = 1 << 50 // larger counts are not believed
)

// usageReader finds the usage in the body of an answer while it is written.
type usageReader struct {
	read func([]byte) (Usage, bool) // of the program; nil for the scanner

	form  form
	scan  scanner
	usage Usage // of read
	found bool
	doc   []byte // for read
	long  bool   // the document is too long for read

	// Of the line of a stream of events: its first bytes, how many, and whether it is data.
	field    [5]byte
	column   int
	data, cr bool
}

// form is the form of a body.
type form uint8

const (
	noForm form = iota
	jsonForm
	eventForm
)

// begin chooses the form by the header.
func (u *usageReader) begin(h http.Header) {
	if e := h.Get("Content-Encoding"); e != "" && e != "identity" {
		return
	}
	switch kind, _, _ := mime.ParseMediaType(h.Get("Content-Type")); {
	case kind == "text/event-stream":
		u.form = eventForm
	case kind == "application/json", strings.HasSuffix(kind, "+json"), strings.HasSuffix(kind, "ndjson"):
		u.form = jsonForm
	}
}

// look looks at the next part of the body.
func (u *usageReader) look(p []byte) {
	switch u.form {
	case jsonForm:
		for _, c := range p {
			u.add(c)
		}
	case eventForm:
		for _, c := range p {
			u.event(c)
		}
	}
}

// result ends the body, and returns the usage.
func (u *usageReader) result() (Usage, bool) {
	u.endDocument()
	if u.read != nil {
		return u.usage, u.found
	}
	return u.scan.usage()
}

// add adds a byte to the document.
func (u *usageReader) add(c byte) {
	switch {
	case u.read == nil:
		u.scan.add(c)
	case len(u.doc) == maxDocument:
		u.long = true
	default:
		u.doc = append(u.doc, c)
	}
}

// endDocument ends a document.
func (u *usageReader) endDocument() {
	u.scan.endDocument()
	if len(u.doc) > 0 && !u.long {
		if usage, ok := u.read(u.doc); ok {
			u.usage, u.found = usage, true
		}
	}
	u.doc, u.long = u.doc[:0], false
}

// event takes the next byte of a stream of events: lines that begin in "data:" hold the documents, and an
// empty line ends one.
func (u *usageReader) event(c byte) {
	after := u.cr
	u.cr = c == '\r'
	switch {
	case c == '\n' && after:
	case c == '\n' || c == '\r':
		if u.column == 0 {
			u.endDocument()
		} else if u.data {
			u.add('\n')
		}
		u.column, u.data = 0, false
	case u.column < len(u.field):
		u.field[u.column] = c
		u.column++
		u.data = string(u.field[:u.column]) == "data:"
	case u.data:
		u.add(c)
	}
}

// counts are the usage in the forms of OpenAI's two APIs and Anthropic's. unknown stands where one is absent
// or null, so that a later object adds to an earlier one.
type counts struct {
	Prompt     int64 `json:"prompt_tokens"`
	Completion int64 `json:"completion_tokens"`
	Total      int64 `json:"total_tokens"`
	Input      int64 `json:"input_tokens"`
	Output     int64 `json:"output_tokens"`
	CacheRead  int64 `json:"cache_read_input_tokens"`
	CacheWrite int64 `json:"cache_creation_input_tokens"`
	OfPrompt   part  `json:"prompt_tokens_details"`
	OfInput    part  `json:"input_tokens_details"`
}

// part is the part of a count that came from a cache.
type part struct {
	Cached int64 `json:"cached_tokens"`
}

const unknown = -1

var noCounts = counts{unknown, unknown, unknown, unknown, unknown, unknown, unknown, part{unknown}, part{unknown}}

// scanner finds the member "usage" of a JSON document, or of its members "message" and "response", byte by
// byte. It checks no syntax: a text that is no JSON has at worst a usage of its own.
type scanner struct {
	depth   int
	nested  bool // the object at depth 2 is message or response
	partial bool // it is message, with which Anthropic begins a stream: its counts are not the last
	text    bool // in a string
	escape  bool // after a backslash
	last    [10]byte
	length  int    // of the string in last; more where it is longer
	key     string // of the value that follows, if its name is of interest

	object []byte // with the counts, so far
	inside int    // its depth; 0 outside
	counts counts // valid if any
	any    bool
	final  bool // they are those at the end
}

func (s *scanner) endDocument() {
	s.depth, s.nested, s.partial, s.text, s.escape, s.length, s.key, s.inside = 0, false, false, false, false, 0, "", 0
}

func (s *scanner) add(c byte) {
	if s.inside > 0 {
		if s.object = append(s.object, c); len(s.object) > maxCounts {
			s.inside = 0
		}
	}
	if s.text {
		switch {
		case s.escape:
			s.escape, s.length = false, len(s.last)+1 // no name of interest has one
		case c == '\\':
			s.escape = true
		case c == '"':
			s.text = false
		case s.length < len(s.last):
			s.last[s.length] = c
			s.length++
		default:
			s.length = len(s.last) + 1
		}
		return
	}
	switch c {
	case '"':
		s.text, s.length = true, 0
	case ':':
		s.key = ""
		if s.depth == 1 || s.depth == 2 && s.nested {
			switch name := string(s.last[:min(s.length, len(s.last))]); name {
			case "usage", "message", "response":
				s.key = name
			}
		}
	case ',':
		s.key = ""
	case '{', '[':
		s.depth++
		if c == '{' && s.inside == 0 {
			s.begin()
		}
		s.key = ""
	case '}', ']':
		s.depth = max(s.depth-1, 0)
		switch {
		case s.inside > 0 && s.depth < s.inside:
			s.inside = 0
			s.endCounts()
		case s.depth < 2:
			s.nested, s.partial = false, false
		}
	}
}

// begin begins an object as the value of s.key.
func (s *scanner) begin() {
	switch {
	case s.key == "usage":
		s.inside, s.object = s.depth, append(s.object[:0], '{')
	case s.key != "" && s.depth == 2:
		s.nested, s.partial = true, s.key == "message"
	}
}

// endCounts reads an object of counts. One that cannot be read changes nothing.
func (s *scanner) endCounts() {
	c := s.counts
	if !s.any {
		c = noCounts
	}
	if json.Unmarshal(s.object, &c) == nil {
		s.counts, s.any, s.final = c, true, s.final || !s.partial
	}
}

// usage returns the counts.
func (s *scanner) usage() (Usage, bool) {
	c, u := &s.counts, Usage{}
	if !s.final || *c == noCounts {
		return u, false
	}
	for _, n := range [...]*int64{&c.Prompt, &c.Completion, &c.Total, &c.Input, &c.Output, &c.CacheRead, &c.CacheWrite, &c.OfPrompt.Cached, &c.OfInput.Cached} {
		if *n > maxTokens {
			return u, false
		}
		*n = max(*n, 0) // some services write -1 where they do not know
	}
	u = Usage{Input: c.Prompt + c.Input, Output: c.Completion + c.Output, CacheRead: c.CacheRead, CacheWrite: c.CacheWrite}
	cached := min(c.OfPrompt.Cached+c.OfInput.Cached, u.Input)
	u.Input, u.CacheRead = u.Input-cached, u.CacheRead+cached
	u.Output += max(c.Total-u.Tokens(), 0) // such as tokens of thought
	return u, true
}
