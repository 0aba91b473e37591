package redisserver

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
)

// Error is an error reply of the server, such as "ERR unknown command".
type Error string

func (e Error) Error() string { return string(e) }

// appendCommand appends args to b as a RESP array of bulk strings.
func appendCommand(b []byte, args ...string) []byte {
	b = fmt.Appendf(b, "*%d\r\n", len(args))
	for _, a := range args {
		b = fmt.Appendf(b, "$%d\r\n%s\r\n", len(a), a)
	}
	return b
}

// readReply reads one RESP2 reply: a string, an int64, nil, a []any, or an Error (also inside an array).
func readReply(r *bufio.Reader) (any, error) {
	line, err := r.ReadBytes('\n')
	if err != nil {
		return nil, err
	}
	kind, text := line[0], strings.TrimRight(string(line[1:]), "\r\n")
	switch kind {
	case '+':
		return text, nil
	case '-':
		return Error(text), nil
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		return nil, fmt.Errorf("redisserver: bad reply line %q", line)
	}
	switch {
	case kind == ':':
		return n, nil
	case (kind == '$' || kind == '*') && n < 0:
		return nil, nil
	case kind == '$':
		b := make([]byte, n+2)
		if _, err := io.ReadFull(r, b); err != nil {
			return nil, err
		}
		return string(b[:n]), nil
	case kind == '*':
		out := make([]any, n)
		for i := range out {
			if out[i], err = readReply(r); err != nil {
				return nil, err
			}
		}
		return out, nil
	}
	return nil, fmt.Errorf("redisserver: bad reply line %q", line)
}

// appendFrame reads one whole RESP2 or RESP3 frame and appends its bytes, unchanged, to b. It also returns
// the frame's type byte.
func appendFrame(b []byte, r *bufio.Reader) ([]byte, byte, error) {
	start := len(b)
	b, err := appendLine(b, r)
	if err != nil {
		return b, 0, err
	}
	kind, text := b[start], string(bytes.TrimRight(b[start+1:], "\r\n"))
	var children int64
	switch kind {
	case '+', '-', ':', '_', '#', ',', '(':
		return b, kind, nil
	case '$', '=', '!', '*', '~', '>', '%', '|':
		if children, err = strconv.ParseInt(text, 10, 32); err != nil {
			return b, kind, fmt.Errorf("redisserver: bad RESP length %q", text)
		}
	default:
		return b, kind, fmt.Errorf("redisserver: not RESP: %q", b[start:])
	}
	switch kind {
	case '$', '=', '!':
		if children < 0 {
			return b, kind, nil
		}
		at := len(b)
		b = append(b, make([]byte, children+2)...)
		_, err = io.ReadFull(r, b[at:])
		return b, kind, err
	case '%':
		children *= 2
	case '|': // attributes precede the value that they describe
		children = children*2 + 1
	}
	for ; children > 0; children-- {
		if b, _, err = appendFrame(b, r); err != nil {
			return b, kind, err
		}
	}
	return b, kind, nil
}

func appendLine(b []byte, r *bufio.Reader) ([]byte, error) {
	for {
		part, err := r.ReadSlice('\n')
		b = append(b, part...)
		if !errors.Is(err, bufio.ErrBufferFull) {
			return b, err
		}
	}
}

// readCommand reads one request and returns its bytes and its arguments. A request that does not begin with
// '*' is an inline command.
func readCommand(r *bufio.Reader) (frame []byte, args []string, err error) {
	first, err := r.Peek(1)
	if err != nil {
		return nil, nil, err
	}
	if first[0] != '*' {
		frame, err = appendLine(nil, r)
		return frame, strings.Fields(string(frame)), err
	}
	if frame, _, err = appendFrame(nil, r); err != nil {
		return nil, nil, err
	}
	v, err := readReply(bufio.NewReader(bytes.NewReader(frame)))
	if err != nil {
		return nil, nil, err
	}
	list, _ := v.([]any)
	for _, a := range list {
		s, _ := a.(string)
		args = append(args, s)
	}
	return frame, args, nil
}

// Slot returns the hash slot of a key, with Redis Cluster's rule for hash tags.
func Slot(key string) int {
	if i := strings.IndexByte(key, '{'); i >= 0 {
		if n := strings.IndexByte(key[i+1:], '}'); n > 0 {
			key = key[i+1 : i+1+n]
		}
	}
	var crc uint16 // CRC16-XMODEM
	for i := range len(key) {
		crc ^= uint16(key[i]) << 8
		for range 8 {
			if crc&0x8000 != 0 {
				crc = crc<<1 ^ 0x1021
			} else {
				crc <<= 1
			}
		}
	}
	return int(crc & (slots - 1))
}

const slots = 16384
