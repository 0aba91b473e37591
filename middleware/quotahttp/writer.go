package quotahttp

import (
	"bufio"
	"io"
	"net"
	"net/http"
)

// writer notes the status of an answer, and looks at its body where the usage is wanted. It is not safe for
// concurrent use, as no http.ResponseWriter is.
type writer struct {
	http.ResponseWriter
	status int          // 0 until the header is written
	usage  *usageReader // nil where it is not wanted
}

// Unwrap returns the writer inside, for [http.ResponseController].
func (w *writer) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// begin notes that the header is written.
func (w *writer) begin(status int) {
	if w.status != 0 {
		return
	}
	w.status = status
	if w.usage != nil {
		w.usage.begin(w.Header())
	}
}

// end returns the status of an answer that is over.
func (w *writer) end() int {
	w.begin(http.StatusOK)
	return w.status
}

func (w *writer) WriteHeader(status int) {
	if status >= 200 || status == http.StatusSwitchingProtocols { // others go in front of the answer
		w.begin(status)
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *writer) Write(p []byte) (int, error) {
	w.begin(http.StatusOK)
	n, err := w.ResponseWriter.Write(p)
	if w.usage != nil && 0 < n && n <= len(p) {
		w.usage.look(p[:n])
	}
	return n, err
}

func (w *writer) WriteString(s string) (int, error) {
	if w.usage != nil {
		return w.Write([]byte(s))
	}
	w.begin(http.StatusOK)
	return io.WriteString(w.ResponseWriter, s)
}

// wrap returns the writer with the optional interfaces of the one inside, for handlers that assert them:
// those that use http.ResponseController get along with Unwrap.
func (w *writer) wrap() http.ResponseWriter {
	_, flushes := w.ResponseWriter.(http.Flusher)
	_, hijacks := w.ResponseWriter.(http.Hijacker)
	_, reads := w.ResponseWriter.(io.ReaderFrom)
	push, pushes := w.ResponseWriter.(http.Pusher)
	f, h, r := flusher{w}, hijacker{w}, readerFrom{w}
	switch {
	case flushes && hijacks && reads: // HTTP/1
		return struct {
			*writer
			flusher
			hijacker
			readerFrom
		}{w, f, h, r}
	case flushes && pushes: // HTTP/2
		return struct {
			*writer
			flusher
			http.Pusher
		}{w, f, push}
	case flushes && hijacks:
		return struct {
			*writer
			flusher
			hijacker
		}{w, f, h}
	case flushes && reads:
		return struct {
			*writer
			flusher
			readerFrom
		}{w, f, r}
	case hijacks && reads:
		return struct {
			*writer
			hijacker
			readerFrom
		}{w, h, r}
	case flushes:
		return struct {
			*writer
			flusher
		}{w, f}
	case hijacks:
		return struct {
			*writer
			hijacker
		}{w, h}
	case reads:
		return struct {
			*writer
			readerFrom
		}{w, r}
	}
	return w
}

type flusher struct{ to *writer }

func (f flusher) Flush() { _ = f.FlushError() }

func (f flusher) FlushError() error {
	f.to.begin(http.StatusOK)
	return http.NewResponseController(f.to.ResponseWriter).Flush()
}

type hijacker struct{ to *writer }

func (h hijacker) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, buffer, err := h.to.ResponseWriter.(http.Hijacker).Hijack()
	if err == nil {
		h.to.begin(http.StatusSwitchingProtocols)
	}
	return conn, buffer, err
}

type readerFrom struct{ to *writer }

// ReadFrom copies from a file without a buffer where the writer inside can, unless the body is looked at.
func (r readerFrom) ReadFrom(from io.Reader) (int64, error) {
	if r.to.usage != nil {
		return io.Copy(struct{ io.Writer }{r.to}, from)
	}
	r.to.begin(http.StatusOK)
	return r.to.ResponseWriter.(io.ReaderFrom).ReadFrom(from)
}
