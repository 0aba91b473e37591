package main

import (
	"bytes"
	"image/color"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

// chart is a picture of bars, one below the other.
type chart struct {
	name, title string
	bars        []bar
}

// bar is a median, with the least and the greatest of its samples.
type bar struct {
	label                  string
	kind                   kind
	value, least, greatest float64
}

var colors = map[kind]color.Color{
	peer:   color.RGBA{0x8c, 0x95, 0x9f, 0xff},
	ours:   color.RGBA{0x09, 0x69, 0xda, 0xff},
	leased: color.RGBA{0x54, 0xae, 0xff, 0xff},
	floor:  color.RGBA{0xd0, 0xd7, 0xde, 0xff},
}

func (c chart) svg() ([]byte, error) {
	const width, barHeight, room = 580, 20, 44 // points
	p := plot.New()
	p.Title.Text = c.title
	p.Title.Padding = 6
	p.X.Min, p.X.Max = 0, 0
	p.HideX()
	names := make([]string, len(c.bars)) // from below
	ends := plotter.XYLabels{}
	for i, b := range c.bars {
		y := len(c.bars) - 1 - i
		names[y] = b.label
		p.X.Max = max(p.X.Max, 1.15*b.greatest) // the figure stands behind
		body, err := plotter.NewBarChart(plotter.Values{b.value}, barHeight*0.75)
		if err != nil {
			return nil, err
		}
		body.Horizontal, body.XMin, body.Color, body.LineStyle.Width = true, float64(y), colors[b.kind], 0
		spread, err := plotter.NewXErrorBars(struct {
			plotter.XYs
			plotter.XErrors
		}{plotter.XYs{{X: b.value, Y: float64(y)}}, plotter.XErrors{{Low: b.least - b.value, High: b.greatest - b.value}}})
		if err != nil {
			return nil, err
		}
		p.Add(body, spread)
		ends.XYs = append(ends.XYs, plotter.XY{X: b.greatest, Y: float64(y)})
		ends.Labels = append(ends.Labels, " "+number(b.value))
	}
	figures, err := plotter.NewLabels(ends)
	if err != nil {
		return nil, err
	}
	for i := range figures.TextStyle {
		figures.TextStyle[i].YAlign = draw.YCenter
	}
	p.Add(figures)
	p.NominalY(names...)
	sans(&p.Title.TextStyle.Font, &p.Y.Tick.Label.Font)
	for i := range figures.TextStyle {
		sans(&figures.TextStyle[i].Font)
	}
	canvas := vgsvg.New(width, vg.Length(barHeight*len(c.bars)+room))
	p.Draw(draw.Crop(draw.New(canvas), 8, -8, 0, -4))
	var b bytes.Buffer
	if _, err := canvas.WriteTo(&b); err != nil {
		return nil, err
	}
	// Where a browser lacks the font it takes another one of the same widths.
	return bytes.ReplaceAll(b.Bytes(), []byte("font-family:Liberation Sans;"), []byte("font-family:Liberation Sans,Arial,sans-serif;")), nil
}

func sans(fonts ...*font.Font) {
	for _, f := range fonts {
		f.Variant = "Sans"
	}
}
