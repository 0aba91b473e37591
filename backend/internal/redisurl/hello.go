package redisurl

import (
	"bytes"
	"strconv"
	"sync"
)

// hello keeps HELLO from a server, and answers it in the server's place as one does that does not know the
// command. Both client libraries send it even where they are to speak RESP2, and a proxy such as twemproxy closes
// the connection at a command that it does not know. The other commands of a handshake in RESP2, AUTH and SELECT,
// have replies of one line.
type hello struct {
	mu       sync.Mutex
	sent     int    // commands that went to the server
	replied  int    // replies of the server
	kept     []int  // the values of sent at which a HELLO was kept
	replies  []byte // for the client
	midlines bool   // replies ends within a line
}

const unknownHello = "-ERR unknown command 'HELLO'\r\n"

// cut returns the commands of p without HELLO.
func (h *hello) cut(p []byte) []byte {
	h.mu.Lock()
	defer h.mu.Unlock()
	var out []byte
	for len(p) > 0 {
		command, rest := split(p)
		if name(command) == "hello" {
			h.kept = append(h.kept, h.sent)
		} else {
			out = append(out, command...)
			if command[0] == '*' {
				h.sent++
			}
		}
		p = rest
	}
	h.answer()
	return out
}

// put takes bytes of the server's replies.
func (h *hello) put(p []byte) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for line := range bytes.Lines(p) {
		h.replies = append(h.replies, line...)
		if h.midlines = line[len(line)-1] != '\n'; !h.midlines {
			h.replied++
			h.answer()
		}
	}
}

// answer answers the HELLOs whose turn it is.
func (h *hello) answer() {
	for len(h.kept) > 0 && h.kept[0] <= h.replied && !h.midlines {
		h.replies = append(h.replies, unknownHello...)
		h.kept = h.kept[1:]
	}
}

// take moves replies to p and returns how many bytes they are.
func (h *hello) take(p []byte) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	n := copy(p, h.replies)
	h.replies = h.replies[n:]
	return n
}

// split returns the first command of p, as a client wrote it, and the rest. Where p does not begin with a whole
// command, all of it is the first.
func split(p []byte) (command, rest []byte) {
	at := 0
	number := func(kind byte) (int, bool) {
		end := bytes.Index(p[at:], []byte("\r\n"))
		if end < 1 || p[at] != kind {
			return 0, false
		}
		n, err := strconv.Atoi(string(p[at+1 : at+end]))
		at += end + 2
		return n, err == nil && n >= 0
	}
	args, ok := number('*')
	for ; ok && args > 0; args-- {
		var size int
		if size, ok = number('$'); ok && size <= len(p)-at-2 {
			at += size + 2
		} else {
			ok = false
		}
	}
	if !ok {
		return p, nil
	}
	return p[:at], p[at:]
}
